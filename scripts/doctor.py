"""Says what is installed, what runs here and what to do: python scripts/doctor.py."""

from pyllm._cli import run
from pyllm.doctor import Config, main

if __name__ == "__main__":
    run(main, Config)
