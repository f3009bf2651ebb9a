"""The subcommands of `tt-fast`. What one needs is imported when it runs."""
