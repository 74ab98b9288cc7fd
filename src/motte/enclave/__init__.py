"""How a trusted process is started: ``process``, without hardware protection, and ``gramine-*``, from a closed image.

What makes such an image, its manifest and its measurement is here too; :mod:`motte.doctor.image_build` joins them.
"""
