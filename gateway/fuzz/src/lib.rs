//! What several fuzz targets need: sessions, opened as a request would open them.

use std::sync::Arc;

use broker_bridge::RoomName;
use tidegate::{
    auth::Keyring,
    config::{Config, Sources},
    framing::Transport,
    protocol::{Ask, Endpoint, MakeProtocol, On},
    settings::Settings,
};

/// Makes the protocol of the sessions that an endpoint opens on a transport for a request with this query.
///
/// # Panics
///
/// If it opens none.
pub fn open(endpoint: &Endpoint, transport: Transport, query: &str, room: Option<RoomName>) -> MakeProtocol {
    let config = Config::load(&Sources::default()).expect("the defaults are valid");
    let settings = Settings::new(&config, Arc::new(Keyring::new(Vec::new(), Vec::new())));
    let request = http::Request::get(format!("/?{query}")).body(()).expect("a request");
    let ask = Ask { request: &request.into_parts().0, settings: &settings, room };
    let open = endpoint.routes.iter().find_map(|route| match route.on {
        On::WebSocket { open, .. } if transport == Transport::WebSocket => Some(open),
        On::Stream { open, .. } if transport == Transport::Body => Some(open),
        _ => None,
    });
    open.expect("an endpoint of sessions")(&ask).expect("a session").protocol
}
