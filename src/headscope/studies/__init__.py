"""Studies of features and heads, grouped by the question that they answer; each returns frozen records."""
