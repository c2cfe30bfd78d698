"""Files of users: tables row by row, judged CSV files, conversations as token spans."""
