"""From a recipe to a plan, a run and a report; and the command line."""
