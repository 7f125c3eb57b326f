"""What a person looks at: self-contained pages of runs, no network needed."""
