"""looptx_cli: the command line, a thin face over looptx_core."""
