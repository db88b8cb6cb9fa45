"""What the lab puts into Dom0: its first process, the agent and the installer."""
