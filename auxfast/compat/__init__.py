"""Drop-ins and adapters for other libraries: AuxiLearn's names on auxfast's kernels; operators of curvlinops and SciPy,
and torchopt's `solve=`."""
