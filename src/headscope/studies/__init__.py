"""Studies of features and heads, by the question that they answer; each returns frozen records."""
