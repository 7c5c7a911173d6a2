"""From runs to a law: Newton's method, the loss law, averaged forms, other forms, isoFLOP profiles, the envelope, and
the law of learning rate and batch size. It may import `common` and `laws`.
"""
