"""Tasks: what a model is asked, or measured on, and how that is scored. Each is a frozen dataclass in its own file."""
