"""The conductor: recipe -> plan -> run -> report, and the command line."""
