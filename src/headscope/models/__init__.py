"""Language models behind one small interface: read activations, edit a run, and access the weights."""
