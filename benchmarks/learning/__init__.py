"""Eight tasks that nobody tunes for: is learning the combination safe with the defaults?

    python -m benchmarks.learning            10 seeds of every method: the table (also: make learning)
    python -m benchmarks.learning --crashes  20 seeds of the learned combiners: does training survive?
    python -m benchmarks.learning --smoke    a few steps of everything: does it run?

One configuration of the outer loop serves all (`defaults`). It was chosen on half of the tasks (diabetes, CNN, breast
cancer and noisy auxiliaries) and on seeds from 1000 on; digits, stereo, wine and deep supervision are reported as they
come, and all results are of seeds from 0 on.
"""
