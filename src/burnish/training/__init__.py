"""What every verb that trains a model shares: options, the trainer, the course of a run, and what is written."""
