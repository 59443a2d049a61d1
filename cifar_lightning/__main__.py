"""`python -m cifar_lightning`: the same program as train.py."""

from cifar_lightning.cli.main import main

if __name__ == "__main__":
    main()
