"""The op families in Triton: one file per family, with a function for every op of that family in quantops/library.py.

This folder is installed as the package ``quantops.kernels``.
"""

if __name__ == "kernels":
    # Imported from the source tree's root. Another package has this name, and whoever looks for that one (transformers
    # does, when it is imported) is to find nothing here.
    __path__ = []

    def __getattr__(name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "kernels: this folder is the package quantops.kernels, not a top-level one. Install the project "
            "(pip install -e .) and use 'from quantops.kernels import uniform'."
        )
