"""``python -m lightning_modules``."""

try:
    from lightning_modules.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(f"error: the command line needs {error.name}: pip install pibinn-plugin[lightning]") from error

main()
