"""A student behind HTTP, and the page that runs it in a browser."""
