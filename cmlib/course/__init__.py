"""What the notebooks say and check: a module a lesson and a persona's exercise."""
