def _natural_sort_key(path):
    return path
