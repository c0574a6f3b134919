"""Model frontend: a checkpoint folder or a model.py → `fxquant.models.DeepseekV3`, the one form that is traced.

source.py      MODEL, a folder or a model.py → Source
user_file.py   imports a model.py and checks what it defines
child.py       the process in which that file runs
adapt.py       a foreign model as one of ours, and as it was afterwards
adaptation.py  converts its modules one by one: published classes to ours, every other to its own forward
recognition/   which classes are published, by their code, and how others differ
own/           what a class's own forward is handed, so that it can be traced
bridges.py     forwards of a user's modules as those around them call, and are called by, ours
adapters.py    one class of a foreign model as one of ours: data, for the families and for LEAVES
families/      known model families and their classes, one file each
proof/         runs copies with random weights: the graph must compute what the model's own forward does
"""
