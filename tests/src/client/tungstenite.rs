//! A plain WebSocket with `tokio-tungstenite`.

use anyhow::Result;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderName, HeaderValue};
use tokio::{net::TcpStream, sync::mpsc};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{
        self, Error, Message as Frame,
        client::IntoClientRequest as _,
        protocol::{CloseFrame, WebSocketConfig},
    },
};

use super::{Client, Writer};
use crate::journal::{End, Message, Payload};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub(super) fn connect(url: &str, headers: &[(&str, &str)]) -> Result<Client> {
    let mut request = url.into_client_request()?;
    for (name, value) in headers {
        request.headers_mut().append(name.parse::<HeaderName>()?, HeaderValue::from_str(value)?);
    }
    let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
    Ok(Client::start("tungstenite", |journal, commands| async move {
        match connect_async_with_config(request, Some(config), true).await {
            Ok((socket, _)) => {
                journal.opened();
                journal.ended(converse(socket, &journal, commands).await);
            }
            Err(Error::Http(response)) => journal.ended(End::Refused(response.status().as_u16())),
            Err(_) => journal.ended(End::Lost),
        }
    }))
}

async fn converse(mut socket: Socket, journal: &Writer, mut commands: mpsc::Receiver<Payload>) -> End {
    let mut leaving = false;
    loop {
        // Both branches are cancel safe: `recv`, and a stream's `next`.
        tokio::select! {
            command = commands.recv(), if !leaving => {
                let sent = if let Some(payload) = command {
                    socket.send(frame(payload)).await
                } else {
                    leaving = true;
                    socket.close(None).await
                };
                // A socket that the server has closed cannot be written; its close frame can still be read.
                leaving |= sent.is_err();
            }
            received = socket.next() => match received {
                Some(Ok(Frame::Text(text))) => journal.message(Message::plain(Payload::text(text.as_str()))),
                Some(Ok(Frame::Binary(bytes))) => journal.message(Message::plain(Payload::binary(bytes))),
                Some(Ok(Frame::Close(frame))) => {
                    // The answer to the close frame is sent with the next read.
                    while let Some(Ok(_)) = socket.next().await {}
                    return closed(frame);
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return End::Lost,
            }
        }
    }
}

fn frame(payload: Payload) -> Frame {
    match payload {
        Payload::Text(text) => Frame::text(text),
        Payload::Binary(bytes) => Frame::binary(bytes),
    }
}

fn closed(frame: Option<CloseFrame>) -> End {
    match frame {
        Some(frame) => End::Closed { code: frame.code.into(), reason: frame.reason.to_string() },
        None => End::Closed {
            code: tungstenite::protocol::frame::coding::CloseCode::Status.into(),
            reason: String::new(),
        },
    }
}
