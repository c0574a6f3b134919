"""From a model as a user holds it to `fxquant.models.DeepseekV3`, the one form that is traced.

source.py      MODEL, a folder or a model.py → Source
user_file.py   what a model.py defines, imported and checked
child.py       the process in which that file runs
adapt.py       a foreign model's classes → ours, on the instance, and back
adapters.py    one class of a foreign model as one of ours: data, for the families and for LEAVES
families/      which classes a family of sources has, one file each
probe.py       a small copy with random weights: the graph computes what the model's own forward does
"""
