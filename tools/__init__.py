"""Programs for developing this project; the packages import none of them."""
