"""python -m nvfp4sweep: what torchrun starts."""

from nvfp4sweep.cli import app

if __name__ == "__main__":
    app(prog_name="nvfp4sweep")
