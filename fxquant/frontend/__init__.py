"""Model frontend: a checkpoint folder or a model.py → `fxquant.models.DeepseekV3`, the one form that is traced.

source.py      MODEL, a folder or a model.py → Source
user_file.py   imports a model.py and checks what it defines
child.py       the process in which that file runs
adapt.py       replaces a foreign model's classes by ours, on the instance, and restores them
adapters.py    one class of a foreign model as one of ours: data, for the families and for LEAVES
families/      known model families and their classes, one file each
proof/         runs copies with random weights: the graph must compute what the model's own forward does
"""
