//! Finds what somebody may have meant.

/// The known names nearest to `name`, at most three, none if none is near.
pub(super) fn suggest<'a>(name: &str, known: impl Iterator<Item = &'a str> + Clone) -> Vec<&'a str> {
    // Longer than any key could be misspelt; the distance costs the product of both lengths.
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

/// Insertions, deletions and replacements that lead from one text to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, b) in row.iter_mut().zip(std::iter::once(None).chain(to.chars().map(Some))) {
            let Some(b) = b else {
                *cell = left;
                continue;
            };
            let above = *cell;
            left = (diagonal + usize::from(a != b)).min(above + 1).min(left + 1);
            diagonal = above;
            *cell = left;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (from, to, expected) in
            [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
        {
            assert_eq!(distance(from, to), expected, "{from} {to}");
            assert_eq!(distance(to, from), expected, "{to} {from}");
        }
    }

    #[test]
    fn suggests_what_is_near_and_nothing_else() {
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
