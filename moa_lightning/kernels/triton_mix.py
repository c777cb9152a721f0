def supports(names, dtype, compute, device):
    return False
