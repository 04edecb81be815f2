"""The instructor's side: submissions collected, executed in a sandbox, compared and marked."""
