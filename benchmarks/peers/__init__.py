"""Peers, run from their own packages on the same trainings: one adapter a peer, each in an environment of its own.

An adapter is `python -m benchmarks.peers.NAME PROBLEM SCORES.npz METHOD`, run by the environment's Python from the
root of the checkout; it needs torch, NumPy and the peer, not finfluence. `_peers.py` writes the problem (data, network,
checkpoints), runs the adapter and reads the scores. To create the environments in a folder PEERS and use them:

    python -m venv PEERS/captum
    PEERS/captum/bin/pip install torch==2.13.0 numpy
    PEERS/captum/bin/pip install captum==0.9.0
    python -m benchmarks agreement --peers PEERS

and so on, with the packages that `REQUIREMENTS` in `_peers.py` names for each folder. kronfluence pulls torchvision,
which no adapter needs: `pip uninstall torchvision` where its version does not fit torch's. A peer without an
environment is left out of the tables and named under them.

`TEXT_REQUIREMENTS` names the environments of the peers that score language models (`text.py` says what they read), for
`python -m benchmarks poison --peers PEERS`. bergson pulls torchvision and torchaudio, so there it is

    PEERS/bergson/bin/pip install torch==2.13.0 numpy bergson==2.5.1
    PEERS/bergson/bin/pip uninstall torchvision torchaudio
"""
