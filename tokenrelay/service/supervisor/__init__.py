"""Process 0: starts the others of this machine, restarts what dies, and stops them in order."""
