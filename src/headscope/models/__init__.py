"""Language models behind one small interface: read activations, edit a run, and know the weights."""
