"""Other people's trainers, each behind an optional extra; nothing below this floor knows them."""
