_TP = None
