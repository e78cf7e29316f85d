"""What is unmasked, and when: importances, selections, schedules."""
