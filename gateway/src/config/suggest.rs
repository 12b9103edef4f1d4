//! Suggests known names for misspelt ones.

/// The known names closest to `name`: at most three, or none if none is close.
pub(super) fn suggest<'a>(name: &str, known: impl Iterator<Item = &'a str> + Clone) -> Vec<&'a str> {
    // Longer than any misspelt key. The cost of the distance is the product of both lengths.
    const MAX_LEN: usize = 80;
    if name.len() > MAX_LEN {
        return Vec::new();
    }
    let nearest = known.clone().map(|candidate| (distance(name, candidate), candidate)).min();
    if let Some((edits, candidate)) = nearest
        && edits <= 3
        && edits * 3 <= name.chars().count()
    {
        return vec![candidate];
    }
    let last = |name: &str| name.rsplit('.').next().map(str::to_owned);
    known.filter(|candidate| last(candidate) == last(name)).take(3).collect()
}

/// The number of insertions, deletions, replacements and swaps of neighbours that turn one text into the
/// other (Damerau–Levenshtein, each character edited at most once).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    // The row above, the row above that, and the character of that row.
    let mut above: Vec<usize> = (0..=to.len()).collect();
    let mut before: Option<(char, Vec<usize>)> = None;
    for (i, a) in from.chars().enumerate() {
        let mut row = Vec::with_capacity(above.len());
        row.push(i + 1);
        for (j, b) in to.iter().enumerate() {
            let at = |row: &[usize], column: usize| row.get(column).copied().unwrap_or(usize::MAX - 1);
            let mut edits = at(&above, j) + usize::from(a != *b);
            edits = edits.min(at(&above, j + 1) + 1).min(at(&row, j) + 1);
            if let Some((previous, row_before)) = &before
                && previous == b
                && j > 0
                && to.get(j - 1) == Some(&a)
            {
                edits = edits.min(at(row_before, j - 1) + 1);
            }
            row.push(edits);
        }
        before = Some((a, std::mem::replace(&mut above, row)));
    }
    above.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (from, to, expected) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("flaw", "lawn", 2),
            ("debgu", "debug", 1),
            ("atuh", "auth", 1),
            ("ca", "abc", 3),
        ] {
            assert_eq!(distance(from, to), expected, "{from} {to}");
            assert_eq!(distance(to, from), expected, "{to} {from}");
        }
    }

    #[test]
    fn only_similar_names_are_suggested() {
        let known = ["public.listen", "ops.listen", "log.format"];
        let near = |name: &str| suggest(name, known.into_iter());
        assert_eq!(near("public_listen"), ["public.listen"]);
        assert_eq!(near("log.fromat"), ["log.format"]);
        assert_eq!(near("listen"), ["public.listen", "ops.listen"]);
        assert_eq!(near("tls.cert"), <[&str; 0]>::default());
        assert_eq!(near(""), <[&str; 0]>::default());
        assert_eq!(near(&"public.listen".repeat(1000)), <[&str; 0]>::default());
    }
}
