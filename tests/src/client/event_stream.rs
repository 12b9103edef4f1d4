//! An event stream, read from a socket: the parser of WHATWG HTML §9.2.6, without reconnecting.

use anyhow::{Context as _, Result};

use super::{Client, Writer};
use crate::{
    http::{Incoming, Request},
    journal::{End, Journal, Message, Payload},
};

pub(super) fn connect(url: &str) -> Result<Client> {
    let rest = url.strip_prefix("http://").context("an event stream is read over http")?;
    let (authority, path) = rest.split_once('/').context("a URL with a path")?;
    let address = authority.parse()?;
    let request = Request::get(&format!("/{path}")).header("Accept", "text/event-stream");
    Ok(Client::start("event stream", move |journal, mut commands| async move {
        let read = async {
            match request.open(address).await {
                Ok(incoming) if incoming.status == 200 => {
                    journal.opened();
                    read(incoming, &journal).await
                }
                Ok(incoming) => End::Refused(incoming.status),
                Err(_) => End::Lost,
            }
        };
        tokio::select! {
            end = read => journal.ended(end),
            // Nothing can be sent on an event stream; the end of the commands means to disconnect.
            _ = commands.recv() => journal.ended(End::Lost),
        }
    }))
}

async fn read(mut incoming: Incoming, journal: &Writer) -> End {
    let mut parser = Parser::default();
    loop {
        match incoming.chunk().await {
            Ok(Some(bytes)) => journal.modify(|journal| parser.read(&bytes, journal)),
            Ok(None) => return End::Closed { code: 1000, reason: String::new() },
            Err(_) => return End::Lost,
        }
    }
}

/// Reads an event stream piece by piece.
#[derive(Debug, Default)]
pub struct Parser {
    pending: Vec<u8>,
    event: String,
    data: String,
    id: String,
    last_id: String,
}

impl Parser {
    /// What a client sends as `Last-Event-ID`: the id of the last event that was complete.
    pub fn last_event_id(&self) -> &str {
        &self.last_id
    }

    /// Reads the next bytes and records what they complete.
    pub fn read(&mut self, bytes: &[u8], journal: &mut Journal) {
        self.pending.extend_from_slice(bytes);
        while let Some((line, rest)) = first_line(&self.pending) {
            let line = String::from_utf8_lossy(line).into_owned();
            let read = self.pending.len() - rest.len();
            self.pending.drain(..read);
            self.line(&line, journal);
        }
    }

    fn line(&mut self, line: &str, journal: &mut Journal) {
        if line.is_empty() {
            return self.dispatch(journal);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "" => journal.comments += 1,
            "event" => value.clone_into(&mut self.event),
            "data" => {
                self.data.push_str(value);
                self.data.push('\n');
            }
            "id" if !value.contains('\0') => value.clone_into(&mut self.id),
            "retry" => journal.retries.extend(value.parse::<u64>()),
            _ => {}
        }
    }

    fn dispatch(&mut self, journal: &mut Journal) {
        self.last_id.clone_from(&self.id);
        let event = std::mem::take(&mut self.event);
        let mut data = std::mem::take(&mut self.data);
        // An event without a data field is not dispatched; the last line end is not part of the data.
        if data.pop().is_some() {
            let event = if event.is_empty() { "message".to_owned() } else { event };
            journal.messages.push(Message { event, id: self.id.clone(), payload: Payload::Text(data) });
        }
    }
}

/// A line that is complete, and what follows it. A CR at the very end may be half a CRLF.
fn first_line(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = bytes.iter().position(|&byte| byte == b'\n' || byte == b'\r')?;
    let (line, rest) = bytes.split_at(end);
    match rest {
        [b'\r', b'\n', rest @ ..] | [b'\n', rest @ ..] => Some((line, rest)),
        [b'\r', rest @ ..] if !rest.is_empty() => Some((line, rest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result does not depend on how the stream is split.
    #[test]
    fn events_are_read_alike_in_any_split() {
        let stream =
            ": hello\nretry: 1500\n\nevent: a\ndata: x\ndata:y\r\ndata\n\nid: r\rdata:  z\r\rdata: é\n\n\n";
        let mut whole = Journal::default();
        Parser::default().read(stream.as_bytes(), &mut whole);
        let expected = [("a", "", "x\ny\n"), ("message", "r", " z"), ("message", "r", "é")];
        let expected = expected.map(|(event, id, data)| Message {
            event: event.to_owned(),
            id: id.to_owned(),
            payload: Payload::text(data),
        });
        assert_eq!(
            (whole.messages.as_slice(), &whole.retries, whole.comments),
            (&expected[..], &vec![1500], 1)
        );
        for cut in 0..stream.len() {
            let (mut parser, mut journal) = (Parser::default(), Journal::default());
            parser.read(&stream.as_bytes()[..cut], &mut journal);
            parser.read(&stream.as_bytes()[cut..], &mut journal);
            assert_eq!(journal, whole, "cut at {cut}");
        }
    }
}
