"""How command lines show their help."""

import argparse


class Help(
    argparse.ArgumentDefaultsHelpFormatter,
    argparse.RawDescriptionHelpFormatter,
):
    """Descriptions as they are written, and every default."""
