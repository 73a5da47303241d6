"""`python -m fourmill`: the command line, where its script is not on the path."""

from fourmill.pipelines.cli import main

if __name__ == "__main__":
    main()
