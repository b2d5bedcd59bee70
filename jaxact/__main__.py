"""`python -m jaxact`: the command line."""

from jaxact._cli import main

if __name__ == "__main__":
    main()
