"""``python -m localgpt_core`` is ``localgpt``."""

from localgpt_core.cli import main

if __name__ == "__main__":
    main()
