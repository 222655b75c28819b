"""Says what is installed, what runs here and what to do: python scripts/doctor.py."""

import argparse

from pyllm.doctor import main

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
