"""The project's command line; `cifar-lightning` is the same program."""

from cifar_lightning.cli.main import main

if __name__ == "__main__":
    main()
