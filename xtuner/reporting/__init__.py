"""What a run tells its user: the summary in the terminal and the curves."""
