"""Distil a student from a teacher: divergences, chunked losses, cached teachers, the trainer."""
