"""Which features do induction, with and without choosing a head."""
