"""The web page that compares a model with and without compression, on this machine.

python demos/gradio_app.py            # the same as: vtc demo --web
python demos/gradio_app.py --port 0   # any free port
"""

import sys

from vtc.commands import cli

if __name__ == "__main__":
    sys.exit(cli.main(["demo", "--web", *sys.argv[1:]]))
