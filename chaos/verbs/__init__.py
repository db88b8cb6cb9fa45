"""The verbs of the command, a module each or for a few that belong together."""
