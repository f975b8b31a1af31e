"""``python -m localgpt_core`` is ``localgpt``."""

from localgpt_core.cli.commands import main

if __name__ == "__main__":
    main()
