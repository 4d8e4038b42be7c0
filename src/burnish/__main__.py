"""`python -m burnish`, and `torchrun -m burnish`: the command."""

from burnish.cli.main import run

if __name__ == "__main__":
    run()
