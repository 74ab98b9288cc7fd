"""Graph + Plan -> Parts: ``split`` cuts, ``chain`` runs, ``oracle`` proves that parts(x) equals model(x)."""
