"""A model as an integer graph that Deeploy compiles for Siracusa with N-EUREKA."""
